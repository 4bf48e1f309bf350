"""A traced function as data."""

import jax.extend.core as jec


def open_constants(jaxpr: jec.Jaxpr) -> jec.Jaxpr:
    """The jaxpr with its constants as its first inputs; it no longer holds their values."""
    invars = [*jaxpr.constvars, *jaxpr.invars]
    names = jaxpr.debug_info.with_unknown_names()
    return jaxpr.replace(constvars=[], invars=invars, debug_info=names)
