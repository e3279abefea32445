"""Runs the tasks named on the command line, or all of them."""

from examples import common, digits, documents, glyphs

if __name__ == "__main__":
    common.main({"glyphs": glyphs, "digits": digits, "documents": documents})
