"""Lists what the part provides as text, so that finding parts does not import it."""

from braindecode_vis.base.parts import Part, Verb

PART = Part(
    name="audit",
    says="checks of a finished run, by recomputing",
    package=__package__,
    verbs={
        "audit": Verb(
            "verbs:audit",
            group="Ask",
            examples=("audit runs/sub-08", "audit runs/sub-08 --refit", "audit runs/sweep"),
            starts_anew=True,
        ),
    },
    abilities={"audit_run": "run:audit_run"},
)
