"""What runs a stage: settings, tracking, fingerprints, processes. No stage imports it, so a change reruns nothing."""
