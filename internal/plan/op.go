package plan

// Op is one operation of a plan.
type Op struct {
	Kind  uint16
	Flags uint16
	// Name says what the operation does, for errors: "mount /proc".
	Name    string
	Payload []byte
}
