# Attention on CPU has nothing that compiled code elsewhere may rely on.
