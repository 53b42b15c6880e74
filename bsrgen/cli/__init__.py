"""The command line: one file per verb.  Modules here import click alone; a verb imports what it needs when it runs."""
