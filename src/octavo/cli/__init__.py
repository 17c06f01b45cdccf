"""The command line. `octavo.cli.main` is its entry; each command is a module that is imported only when it is used."""
