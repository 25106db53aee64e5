"""Lists what the part provides as text, so that finding parts does not import it."""

from braindecode_vis.base.parts import Part, Verb

PART = Part(
    name="studies",
    says="many runs: sweep, compare, board, score outputs of other systems, tracks for anybody's; and the demo",
    package=__package__,
    verbs={
        "demo": Verb("verbs:demo", group="Run", examples=("demo", "demo --size tiny --out quick")),
        "pretrain": Verb(
            "verbs:pretrain",
            group="Models",
            examples=(
                "pretrain bold5000_wave_vith --root /data/bold5000 --out runs/wave",
                "pretrain --corpus corpora/rest --out encoders/rest --set n_epochs=50 --set encoder.patch_times=8",
            ),
        ),
        "train-generator": Verb(
            "verbs:train_generator", group="Models", examples=("train-generator --out generator",)
        ),
        "sweep": Verb(
            "verbs:sweep",
            group="Scale",
            examples=(
                "sweep synthetic_digits --over seed=0..2 --out runs/seeds",
                "sweep things_eeg2_ridge --root /data/things-eeg2 --over dataset.subjects=[1],[2] --out runs/subjects",
                "sweep synthetic_digits --over seed=0..199 --out runs/seeds --cluster slurm "
                "--cluster-set memory=4 --no-wait",
            ),
        ),
        "compare": Verb(
            "verbs:compare", group="Ask", examples=("compare runs/ridge runs/atm",), starts_anew=True
        ),
        "board": Verb(
            "verbs:board",
            group="Ask",
            examples=(
                "board runs",
                "board runs/seeds --reference runs/seeds/seed-0 --out seeds.html",
                "board --entries entries --out site",
            ),
            starts_anew=True,
        ),
        "score": Verb(
            "score_verbs:score",
            group="Ask",
            examples=(
                "score predicted.npy --targets true.npy",
                "score decoded_images --targets seen_images --kind images",
                "score my_entry --track digits69",
            ),
            starts_anew=True,
        ),
        "tracks": Verb(
            "judging.track_verbs:tracks",
            group="Ask",
            examples=("tracks", "tracks digits69", "tracks make nsd_40h --root /data/nsd --out splits"),
            starts_anew=True,
        ),
        "submit": Verb(
            "judging.track_verbs:submit",
            group="Ask",
            examples=(
                "submit my_entry --track things_eeg2_within",
                "submit runs/digits69_ridge --track digits69 --bring-run",
            ),
            starts_anew=True,
        ),
    },
    abilities={
        "compare_runs": "compare:compare_runs",
        "score": "score_outputs:score",
        "choose_track": "judging.tracks:choose_configuration",
        "check_track": "judging.tracks:check_run",
    },
    reduce={
        "demo": "--size, --subjects, --sessions or --concepts",
        "score_outputs": "the number of predictions or targets, or score groups one by one",
    },
)
