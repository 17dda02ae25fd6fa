"""The commands of prune-cli, a file each: parse, make the request, call, render. No torch at import time."""
