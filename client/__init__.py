"""One institution: data, local training, and what leaves it."""
