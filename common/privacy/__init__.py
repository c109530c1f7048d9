"""The mathematics of differential privacy: noise, what it costs, and how many members' noise adds up."""
