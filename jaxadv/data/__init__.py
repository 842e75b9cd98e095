"""Data: where examples come from and how they become batches.

`load` by name or `arrays` of your own give a `Source`; `batches` streams it in an order that is a pure function of the
seed; `evaluation_subset` fixes what is evaluated; `prepare` makes array_record sets of raw files. Sources live in
`sources.py`, names and tfds folders in `catalog.py`, raw files in `prepare.py`, the stream in `pipeline.py`, generated
data with known truth in `synthetic.py`. Works on plain arrays alone: no TensorFlow, no network.
"""

from jaxadv.data.catalog import SOURCES as SOURCES
from jaxadv.data.catalog import digits as digits
from jaxadv.data.catalog import load as load
from jaxadv.data.catalog import root as root
from jaxadv.data.catalog import tfds_source as tfds_source
from jaxadv.data.pipeline import Readable as Readable
from jaxadv.data.pipeline import as_floats as as_floats
from jaxadv.data.pipeline import balanced_order as balanced_order
from jaxadv.data.pipeline import batches as batches
from jaxadv.data.pipeline import check_workers as check_workers
from jaxadv.data.pipeline import epoch_and_step as epoch_and_step
from jaxadv.data.pipeline import make_batch as make_batch
from jaxadv.data.pipeline import order as order
from jaxadv.data.pipeline import process_rows as process_rows
from jaxadv.data.pipeline import steps_per_epoch as steps_per_epoch
from jaxadv.data.prepare import prepare as prepare
from jaxadv.data.sources import SPLITS as SPLITS
from jaxadv.data.sources import Blend as Blend
from jaxadv.data.sources import Source as Source
from jaxadv.data.sources import arrays as arrays
from jaxadv.data.sources import blend as blend
from jaxadv.data.sources import divide as divide
from jaxadv.data.sources import evaluation_subset as evaluation_subset
from jaxadv.data.sources import idx as idx
from jaxadv.data.sources import jpegs as jpegs
from jaxadv.data.sources import npz as npz
from jaxadv.data.sources import read_idx as read_idx
from jaxadv.data.synthetic import gaussians as gaussians
from jaxadv.data.synthetic import moons as moons
from jaxadv.data.synthetic import separable_images as separable_images
