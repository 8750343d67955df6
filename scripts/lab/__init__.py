"""The laboratory: real guests, QEMU, and measurements, for the demo, the bench, the soaks and the mount tests.

Not part of the installed program.  It uses the program only as its users do: by the command line and the mount.
"""
