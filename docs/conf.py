"""How Sphinx builds these pages.

The first steps are a notebook, which is executed. Nothing is fetched: the pages build without a
network, and those who read them get MathJax from where Sphinx says.
"""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import pyro_symeq

project = "pyro_symeq"
author = "The pyro_symeq developers"
version = release = pyro_symeq.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_symeq {version}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_copyright = False
html_show_sourcelink = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds for a cell, on a busy machine too
nb_merge_streams = True
nb_output_stderr = "remove"
copybutton_exclude = ".linenos, .gp, .go"  # of a doctest, the input alone

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

# Names of Python, Pyro and PyTorch become links; one that is missing here fails the build.
# (Inventories for intersphinx would have to be fetched.)
PYTHON = "https://docs.python.org/3/library/"
PYRO = "https://docs.pyro.ai/en/stable/"
TORCH = "https://docs.pytorch.org/docs/stable/"
LINKS = {
    "Callable": PYTHON + "collections.abc.html#collections.abc.Callable",
    "Constraint": TORCH + "distributions.html#module-torch.distributions.constraints",
    "ELBO": PYRO + "inference_algos.html#pyro.infer.elbo.ELBO",
    "Generator": TORCH + "generated/torch.Generator.html#torch.Generator",
    "Iterable": PYTHON + "collections.abc.html#collections.abc.Iterable",
    "Iterator": PYTHON + "collections.abc.html#collections.abc.Iterator",
    "Mapping": PYTHON + "collections.abc.html#collections.abc.Mapping",
    "Module": TORCH + "generated/torch.nn.Module.html",
    "Optimizer": TORCH + "optim.html#torch.optim.Optimizer",
    "Path": PYTHON + "pathlib.html#pathlib.Path",
    "ProcessGroup": TORCH + "distributed.html#groups",
    "PyroOptim": PYRO + "optimization.html#pyro.optim.optim.PyroOptim",
    "Sequence": PYTHON + "collections.abc.html#collections.abc.Sequence",
    "Size": TORCH + "size.html#torch.Size",
    "SVI": PYRO + "inference_algos.html#pyro.infer.svi.SVI",
    "Store": TORCH + "distributed.html#torch.distributed.Store",
    "TCPStore": TORCH + "distributed.html#torch.distributed.TCPStore",
    "Tensor": TORCH + "tensors.html#torch.Tensor",
    "TorchDistribution": PYRO + "distributions.html#torchdistribution",
    "Trace": PYRO + "poutine.html#trace",
    "Trace_ELBO": PYRO + "inference_algos.html#pyro.infer.trace_elbo.Trace_ELBO",
}


def link_out(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, text: nodes.TextElement
) -> nodes.reference | None:
    """Links a name of Python, Pyro or PyTorch to its place in their documentation."""
    module, _, name = node["reftarget"].rpartition(".")
    if module.startswith("pyro_symeq") or name not in LINKS:
        return None
    return nodes.reference("", "", text, internal=False, refuri=LINKS[name])


def setup(app: Sphinx) -> None:
    """Registers the handler of references that lead out of these pages."""
    app.connect("missing-reference", link_out)
