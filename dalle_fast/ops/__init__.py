"""The operations, each with one face and several implementations."""
