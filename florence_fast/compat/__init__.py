"""Meeting points with other people's code and weights."""
