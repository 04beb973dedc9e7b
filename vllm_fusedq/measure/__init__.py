"""What `fusedq quality` measures: models beside each other in vLLM's engine."""
