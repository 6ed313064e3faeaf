"""Uses the finished model: chat, HTTP, export, MLflow. No stage imports it, so a change reruns nothing."""
