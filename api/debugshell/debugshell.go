// Package debugshell is what the operator, the engine and the first process of a CloudOS machine
// say to each other about the shell for emergencies: who may open one and until when, and
// who has. The engine serves it under /servin/debug-shell and passes it on to the first process,
// which decides. It imports nothing of ours, so that the first process stays small.
package debugshell

import "time"

// Socket is where the first process answers, for the engine alone.
const Socket = "/run/cloudos/debug.sock"

// Target is what a debug session names that looks into the machine itself
// (api.CreateExtra.Debug). No container's name begins with its first character.
const Target = "@host"

// MaxFor is the longest time that a request may switch the shell on for.
const MaxFor = 24 * time.Hour

// Status answers GET /servin/debug-shell, and POST and DELETE.
type Status struct {
	// On says that sessions may be opened.
	On bool `json:"on"`
	// Since and Until bound that; no Until is until the machine starts again.
	Since time.Time `json:"since,omitzero"`
	Until time.Time `json:"until,omitzero"`
	// By is who switched it on, Reason what for.
	By     string `json:"by,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Sessions are those that are open.
	Sessions []Session `json:"sessions,omitempty"`
}

// Session is an open shell.
type Session struct {
	// ID is its container's.
	ID    string    `json:"id"`
	By    string    `json:"by"`
	Since time.Time `json:"since,omitzero"`
}

// Request is the body of POST /servin/debug-shell: it switches the shell on.
type Request struct {
	// For is how long, as Go writes durations: 1h30m, MaxFor at most.
	For string `json:"for"`
	// Reason is recorded. It must be given.
	Reason string `json:"reason"`
	// By is filled in by the engine.
	By string `json:"by,omitempty"`
}
