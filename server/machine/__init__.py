"""This machine: checks of what is wrong for serving, and the rates that predictions rest on."""
