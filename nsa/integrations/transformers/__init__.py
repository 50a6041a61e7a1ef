"""Native sparse attention in transformers: convert a model, train it, save it, generate with it.

Importing this package registers the model type ``"nsa"`` with transformers, so that
``AutoModelForCausalLM.from_pretrained`` finds what ``save_pretrained`` of a converted model wrote.
"""

from nsa.integrations.transformers.version import check_version

check_version()

from nsa.integrations.transformers.attention import NSASelfAttention  # noqa: E402
from nsa.integrations.transformers.cache import NSACacheLayer, NSAStaticCacheLayer  # noqa: E402
from nsa.integrations.transformers.convert import Conversion, convert  # noqa: E402
from nsa.integrations.transformers.listed import listed_attention  # noqa: E402
from nsa.integrations.transformers.models import register  # noqa: E402

register()

__all__ = [
    "Conversion",
    "NSACacheLayer",
    "NSASelfAttention",
    "NSAStaticCacheLayer",
    "convert",
    "listed_attention",
]
