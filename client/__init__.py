"""One institution: data, local training, and what leaves it."""

import common  # noqa: F401 - first, since it keeps the libraries from calling home
