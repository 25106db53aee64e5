from braindecode_vis.api.decoder import Decoder as Decoder
from braindecode_vis.api.decoding_run import DecodingRun as DecodingRun
from braindecode_vis.api.decoding_run import decode as decode
from braindecode_vis.api.decoding_run import open_run as open_run
from braindecode_vis.api.known import describe as describe
from braindecode_vis.api.known import list_configs as list_configs
from braindecode_vis.api.own import Data as Data
from braindecode_vis.api.own import from_arrays as from_arrays
from braindecode_vis.api.own import from_epochs as from_epochs
from braindecode_vis.api.own import from_nifti as from_nifti
from braindecode_vis.api.own import load as load
from braindecode_vis.api.plotting import plot_gallery as plot_gallery
from braindecode_vis.api.plotting import plot_ranks as plot_ranks
from braindecode_vis.api.plotting import plot_scores as plot_scores
from braindecode_vis.base.arrays import Embeddings as Embeddings
from braindecode_vis.base.arrays import Responses as Responses
from braindecode_vis.base.arrays import Score as Score
from braindecode_vis.base.checks import BraindecodeVisError as BraindecodeVisError
from braindecode_vis.base.checks import ConfigError as ConfigError
from braindecode_vis.base.checks import DataError as DataError
from braindecode_vis.base.checks import LeakWarning as LeakWarning
from braindecode_vis.base.stimuli import StimulusSet as StimulusSet
from braindecode_vis.parts.studies.score_outputs import score as score

__version__: str
