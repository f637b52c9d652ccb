package cli

import "os"

func proxiedSignals() []os.Signal { return []os.Signal{os.Interrupt} }

func deathSignals() []os.Signal { return []os.Signal{os.Interrupt} }

func signalName(os.Signal) string { return "SIGINT" }

func signalNumber(os.Signal) int { return 2 }
