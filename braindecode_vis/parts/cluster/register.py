"""Lists what the part provides as text, so that finding parts does not import it."""

from braindecode_vis.base.parts import Part, Verb

PART = Part(
    name="cluster",
    says="stages of many runs as jobs, and estimates of their cost",
    package=__package__,
    verbs={
        "plan": Verb(
            "plan_verbs:plan",
            group="Scale",
            examples=(
                "plan things_eeg2_ridge",
                "plan runs/sub-08",
                "plan things_eeg2_atm_vith --root /data/things-eeg2 --over dataset.subjects=[1],[2] --over seed=0..4",
            ),
            starts_anew=True,
        ),
        "status": Verb(
            "verbs:status", group="Scale", examples=("status runs/seeds",), only_reads=True, starts_anew=True
        ),
        "collect": Verb("verbs:collect", group="Scale", examples=("collect runs/seeds",), starts_anew=True),
        "cancel": Verb(
            "verbs:cancel", group="Scale", examples=("cancel runs/seeds",), only_reads=True, starts_anew=True
        ),
    },
    abilities={"take_jobs": "verbs:on_cluster", "send_sweep": "sweep_verb:send_sweep"},
)
