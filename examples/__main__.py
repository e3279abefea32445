"""Runs the tasks that the command line names, or all tasks."""

from examples import common, digits, documents, glyphs

if __name__ == "__main__":
    common.main({"glyphs": glyphs, "digits": digits, "documents": documents})
