"""Lists what the part provides as text, so that finding parts does not import it."""

from braindecode_vis.base.parts import Part, Verb

PART = Part(
    name="live",
    says="a stream decoded while it runs",
    package=__package__,
    verbs={
        "stream": Verb(
            "stream_verbs:stream",
            group="Live",
            examples=(
                "stream phantom --run demo_run",
                "stream sub-01_task-images_eeg.vhdr --name lab --speed 2",
                "stream phantom --run demo_run --drop 0.01 --jitter 5 --pause 5@60",
            ),
            starts_anew=True,
        ),
        "live": Verb(
            "verbs:live",
            group="Live",
            examples=(
                "live demo_run --stream phantom",
                "live demo_run --stream lab --events codes.tsv --record recorded",
                "live demo_run --stream lab --every 0.5 --no-page --jsonl decisions.jsonl",
            ),
            starts_anew=True,
        ),
    },
    abilities={"open_session": "opening:open_session"},
    reduce={"": "the batch of trials"},
)
