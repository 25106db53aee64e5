"""Lists what the part provides as text, so that finding parts does not import it."""

from braindecode_vis.base.parts import Part, Verb

PART = Part(
    name="analyses",
    says="questions to a finished run: when, where and how it is decoded",
    package=__package__,
    verbs={
        "analyze": Verb(
            "verbs:analyze",
            group="Ask",
            examples=(
                "analyze --list",
                "analyze runs/sub-08 --analysis growing_window --analysis sensor_regions",
            ),
        ),
        "encode": Verb(
            "verbs:encode",
            group="Ask",
            examples=(
                "encode runs/sub-01",
                "encode nsd_ridge --root /data/nsd --subject 1 --set encode.model.combine=banded",
                "encode runs/sub-01 --synthesise pictures --to synthetic_responses",
            ),
        ),
    },
    kinds={
        "analysis": {
            "growing_window": "windows:GrowingWindowConfig",
            "sliding_window": "windows:SlidingWindowConfig",
            "window_reconstructions": "window_images:WindowReconstructionsConfig",
            "time_resolved_categories": "window_categories:TimeResolvedCategoriesConfig",
            "time_generalization": "generalization:TimeGeneralizationConfig",
            "frequency_bands": "bands:FrequencyBandsConfig",
            "sensor_regions": "regions:SensorRegionsConfig",
            "rois": "regions:RoisConfig",
            "network_ablation": "regions:NetworkAblationConfig",
            "layer_time": "layer_time:LayerTimeConfig",
            "spatial_patterns": "patterns:SpatialPatternsConfig",
            "occlusion": "occlusion:OcclusionConfig",
            "integrated_gradients": "attribution:IntegratedGradientsConfig",
            "confusion": "confusion:ConfusionConfig",
            "hubness": "hubness:HubnessConfig",
            "failures": "failures:FailuresConfig",
            "repetitions": "repetitions:RepetitionsConfig",
            "few_shot": "few_shot:FewShotConfig",
            "rsa": "rsa:RsaConfig",
            "joint_retrieval": "joint:JointRetrievalConfig",
            "imagery": "imagery:ImageryConfig",
            "encoding": "encoding:EncodingConfig",
            "attributes": "attributes:AttributesConfig",
        }
    },
    abilities={"analyze_in_run": "analyze:analyze_in_run", "encode_responses": "encode:encode"},
    page="page_section:describe_analyses",
    reduce={"": "the number of trials, or of times (the analysis' own settings)"},
)
