"""Methods for `x = f(x)`, one file a method; see README.md in this folder."""
