"""The C extension of the write side: built at install where a compiler and libjpeg-turbo's headers are."""
