// Package system is what a CloudOS machine and its operator say to each other about the
// system itself: the engine serves it under /servin/os/ on such a machine, and passes it on to
// the first process. It imports nothing, so that the first process stays small.
package system

import "time"

// Socket is where the first process serves these routes, for the engine alone.
const Socket = "/run/cloudos/os.sock"

// Status answers GET /servin/os/status.
type Status struct {
	// Version is that of the running system, as its image says.
	Version string `json:"version"`
	Arch    string `json:"arch"`
	// Platform is metal or cloud, empty where it is not known.
	Platform string `json:"platform,omitempty"`
	Kernel   string `json:"kernel"`
	Hostname string `json:"hostname"`
	// State is starting, ready, safe or stopping; Problems say what is wrong.
	State    string   `json:"state"`
	Problems []string `json:"problems,omitempty"`
	// Slots are the places for systems; none on a machine that does not run from such a disk.
	Slots []Slot `json:"slots,omitempty"`
	// Next is the slot that starts next.
	Next string `json:"next,omitempty"`
	// Keys are the ids of the keys that releases are trusted by.
	Keys []string `json:"keys,omitempty"`
	// Last is the last upgrade or rollback, Busy the one under way.
	Last *Change `json:"last,omitempty"`
	Busy string  `json:"busy,omitempty"`
	// RecoveryKey says that there is a recovery key of encrypted data to be fetched, once.
	RecoveryKey bool `json:"recoveryKey,omitempty"`
}

// Config answers GET /servin/os/config. PUT /servin/os/config takes a document as its body, for
// the next start.
type Config struct {
	// Source is where the document in use is from: cmdline, disk, nocloud, aws, gcp, azure, digitalocean, image or default.
	Source string `json:"source"`
	// Document is the one in use, as YAML, without its secrets.
	Document string `json:"document"`
	// Next is the one that is kept on the disk, where it is another.
	Next string `json:"next,omitempty"`
}

// Recovery answers POST /servin/os/recovery, once.
type Recovery struct {
	Key string `json:"key"`
}

// Slot is a place for a system.
type Slot struct {
	Name string `json:"name"`
	// Version is that of the system in it; empty is no whole system.
	Version string `json:"version,omitempty"`
	// SignedBy is the id of the trusted key that signed it.
	SignedBy string `json:"signedBy,omitempty"`
	Running  bool   `json:"running,omitempty"`
	// Good says that it came up well; Failed that it was tried and given up; TriesLeft
	// how often it will still be tried.
	Good      bool `json:"good,omitempty"`
	Failed    bool `json:"failed,omitempty"`
	TriesLeft int  `json:"triesLeft,omitempty"`
}

// Outcomes of a change.
const (
	Pending    = "pending"     // written; it has not started or not come up yet
	Succeeded  = "succeeded"   // the new system came up well
	RolledBack = "rolled back" // it did not, and the earlier one runs
)

// Change is an upgrade or a rollback.
type Change struct {
	// Kind is upgrade or rollback.
	Kind string `json:"kind"`
	From string `json:"from"`
	To   string `json:"to"`
	Slot string `json:"slot"`
	// Outcome is pending, succeeded or rolled back; Reason says why the latter.
	Outcome string `json:"outcome"`
	Reason  string `json:"reason,omitempty"`
	// Begun and Ended are by the machine's clock.
	Begun time.Time `json:"begun"`
	Ended time.Time `json:"ended,omitzero"`
	// Network says that the earlier system had an address: a new one without any has
	// not come up well.
	Network bool `json:"network,omitempty"`
}

// Progress is a line of the answer of POST /servin/os/upgrade. The last line has Done or Error.
type Progress struct {
	// Step is write or verify.
	Step  string `json:"step,omitempty"`
	Part  string `json:"part,omitempty"`
	Bytes int64  `json:"bytes,omitempty"`
	Total int64  `json:"total,omitempty"`
	// Done describes what was written.
	Done *Change `json:"done,omitempty"`
	// Error says what went wrong, Status is what it would have been as an answer.
	Error  string `json:"error,omitempty"`
	Status int    `json:"status,omitempty"`
}
