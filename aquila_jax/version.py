"""The version of the package, in every MODEL directory and report."""

VERSION = "0.1.0"
