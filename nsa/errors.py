"""One exception class per kind of mistake; what the library raises on purpose is an NSAError."""


class NSAError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(NSAError, ValueError):
    """A configuration that breaks a rule of the method or names an unknown value."""


class SettingsError(NSAError, ValueError):
    """An ``NSA_…`` environment flag that is unknown, does not parse, or contradicts another."""


class ShapeError(NSAError, ValueError):
    """Inputs whose shapes, dtypes, devices or index values do not fit together."""


class BackendUnavailable(NSAError):
    """A backend asked for by name cannot run this problem; nothing else was run instead."""


class CheckpointError(NSAError):
    """A checkpoint that is damaged, truncated, or belongs to another configuration."""


class UsageError(NSAError):
    """A command line that does not parse, or flags that contradict each other."""


class DataError(NSAError):
    """Data that cannot be used: an unreadable or empty path, or values that are not finite."""
