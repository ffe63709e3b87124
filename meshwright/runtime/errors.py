"""The errors that a running rank raises; the compiler adds its own to these."""


class MeshwrightError(Exception):
    """The base of every error that Meshwright raises on purpose."""


class PlanError(MeshwrightError):
    """The request is wrong: a mesh, plan, model, batch or launch that cannot be carried out as asked."""


class BundleError(MeshwrightError):
    """The files of a bundle do not fit its manifest, or the manifest does not keep its own promises."""


class RankError(MeshwrightError):
    """A rank failed while it ran: the message names the rank, the action and the reason."""
