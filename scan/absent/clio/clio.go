// Package clio has the names of clio that grype and syft mention, without the
// command-line framework.
package clio

import (
	"os"

	"github.com/wagoodman/go-partybus"
)

// Identification says which program it is.
type Identification struct {
	Name           string `json:"application,omitempty"`
	Version        string `json:"version,omitempty"`
	GitCommit      string `json:"gitCommit,omitempty"`
	GitDescription string `json:"gitDescription,omitempty"`
	BuildDate      string `json:"buildDate,omitempty"`
}

// ExitEventType is that of ExitEvent.
const ExitEventType partybus.EventType = "exit"

// ExitEvent would end the program; nobody listens.
func ExitEvent(interrupt bool) partybus.Event {
	e := partybus.Event{Type: ExitEventType}
	if interrupt {
		e.Value = os.Interrupt
	}
	return e
}
