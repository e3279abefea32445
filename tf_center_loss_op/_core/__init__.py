"""The path of a call below the public functions: check, choose an implementation, compute."""
