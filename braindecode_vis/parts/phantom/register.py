"""Lists the contents of the part as text, so that the search for parts does not import it."""

from braindecode_vis.base.parts import Part, Verb

PART = Part(
    name="phantom",
    says="simulated subjects in the files of public data sets",
    package=__package__,
    verbs={
        "phantom": Verb(
            "verbs:phantom",
            group="Data",
            examples=(
                "phantom things-eeg2 --out phantom_eeg",
                "phantom nsd --size demo --snr 0.05 --out phantom_fmri --dry-run",
            ),
        ),
    },
    reduce={"": "--size, --subjects, --sessions or --concepts"},
)
