"""Runs the stages: settings, tracking, fingerprints, processes. No stage imports it, so a change reruns nothing."""
