"""Recording a few steps: where their time and their memory go, operation by operation."""
