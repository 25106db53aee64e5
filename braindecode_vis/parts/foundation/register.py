"""Lists what the part provides as text, so that finding parts does not import it."""

from braindecode_vis.base.parts import Part, Verb

PART = Part(
    name="foundation",
    says="corpora of recordings without labels, and published foundation models",
    package=__package__,
    verbs={
        "corpus": Verb(
            "verbs:corpus",
            group="Models",
            examples=(
                "corpus rest --add /data/hcp --add /data/ds002 --set interval_s=1",
                "corpus rest --add /data/ds003 --dry-run",
                "corpus rest",
                "corpus rest --check",
                "corpus caps --add /data/eeg --set channels.kind=meeg",
            ),
        ),
    },
    kinds={
        "encoder": {"in_context": "models.in_context:InContextConfig"},
        "network": {
            "labram": "models.foundation_config:LabramConfig",
            "cbramod": "models.foundation_config:CBraModConfig",
            "brainlm": "models.foundation_fmri_config:BrainLMConfig",
            "brain_jepa": "models.foundation_fmri_config:BrainJepaConfig",
            "cortex_mae": "models.foundation_fmri_config:CortexMaeConfig",
            "neurostorm": "models.foundation_fmri_config:NeuroStormConfig",
            "eegpt": "models.foundation_config:EegptConfig",
            "bendr": "models.foundation_config:BendrConfig",
            "reve": "models.foundation_config:ReveConfig",
            "luna": "models.foundation_config:LunaConfig",
            "voxel_clusters": "models.voxel_clusters_config:VoxelClustersConfig",
        },
    },
    reduce={
        "models": "encoder.batch_size, encoder.max_device_bytes or dataset.subjects",
        "models.in_context": "dataset.subjects, or choose features (selection.*)",
        "models.voxel_context": "dataset.subjects, or choose features (selection.*)",
    },
)
