"""How Sphinx builds these pages. Nothing is fetched: they build without a network."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import pyro_symeq

project = "pyro_symeq"
author = "The pyro_symeq developers"
version = release = pyro_symeq.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_symeq {version}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_copyright = False

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

# Names of Python, Pyro and PyTorch are references too. Those below become links, the rest plain text.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|contextlib|numpy|pathlib|pyro|torch|typing)\..+"),
    ("py:.*", r"bool|dict|float|int|list|object|set|str|tuple|type|optional|callable"),
    ("py:.*", r"Any|Callable|Iterable|Iterator|Literal|Mapping|None|Sequence|[A-Z]\w+Error"),
]
PYRO = "https://docs.pyro.ai/en/stable/"
TORCH = "https://docs.pytorch.org/docs/stable/"
LINKS = {
    "Constraint": TORCH + "distributions.html#module-torch.distributions.constraints",
    "ELBO": PYRO + "inference_algos.html#pyro.infer.elbo.ELBO",
    "Module": TORCH + "generated/torch.nn.Module.html",
    "PyroOptim": PYRO + "optimization.html#pyro.optim.optim.PyroOptim",
    "Size": TORCH + "size.html#torch.Size",
    "SVI": PYRO + "inference_algos.html#pyro.infer.svi.SVI",
    "Tensor": TORCH + "tensors.html#torch.Tensor",
    "TorchDistribution": PYRO + "distributions.html#torchdistribution",
    "Trace": PYRO + "poutine.html#trace",
    "Trace_ELBO": PYRO + "inference_algos.html#pyro.infer.trace_elbo.Trace_ELBO",
}


def link_out(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, text: nodes.TextElement
) -> nodes.reference | None:
    """Links a name of Pyro or PyTorch to its page in their documentation."""
    module, _, name = node["reftarget"].rpartition(".")
    if module.startswith("pyro_symeq") or name not in LINKS:
        return None
    return nodes.reference("", "", text, internal=False, refuri=LINKS[name])


def setup(app: Sphinx) -> None:
    """Registers the handler of references that lead out of these pages."""
    app.connect("missing-reference", link_out)
