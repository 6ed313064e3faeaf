"""What is done with the finished model: answering, export. No stage imports it, so a change reruns nothing."""
