"""Run folders, command lines and checks that the scripts share."""
