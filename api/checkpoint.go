package api

import "time"

// CheckpointStart is the body of POST /servin/containers/{id}/checkpoint, which
// becomes a framed stream: the checkpoint as a tar in output frames, and
// CheckpointEvents in control frames. After Ready the engine waits for one line,
// "commit", and ends the container; without it the container goes on as before.
type CheckpointStart struct {
	// Cold stops the container instead of writing its processes down.
	Cold bool `json:",omitempty"`
	// LeaveRunning lets it go on after the commit, too.
	LeaveRunning bool `json:",omitempty"`
	// Remove removes the container after the commit; its volumes stay.
	Remove bool `json:",omitempty"`
	// Rounds is how many times the memory is copied while the container runs, as
	// long as that pays and where kernel and CRIU can.
	Rounds int `json:",omitempty"`
	// Volumes and Image are carried along.
	Volumes bool `json:",omitempty"`
	Image   bool `json:",omitempty"`
	// TCPEstablished: open connections too, which can only go on at the same address.
	TCPEstablished bool `json:",omitempty"`
	FileLocks      bool `json:",omitempty"`
	// Timeout is how long a cold one has to stop, in seconds; nil is the container's own.
	Timeout *int `json:",omitempty"`
}

// CheckpointEvent is a control frame of that stream.
type CheckpointEvent struct {
	// Stage is what begins: "image", "memory" (with Round from 1 on), "processes",
	// "stop", "files", "volumes".
	Stage string `json:",omitempty"`
	Round int    `json:",omitempty"`
	// Frozen is since when the container stands still.
	Frozen time.Time `json:",omitzero"`
	// Ready: the tar is whole, and the engine waits for the commit.
	Ready bool `json:",omitempty"`
	// Done: the commit was carried out.
	Done bool `json:",omitempty"`
	// Error and Status tell why it failed; the container goes on.
	Error  string `json:",omitempty"`
	Status int    `json:",omitempty"`
}

// CheckpointCreate is the body of POST /containers/{id}/checkpoints: Docker's, and
// what it lacks.
type CheckpointCreate struct {
	CheckpointID  string
	CheckpointDir string `json:",omitempty"`
	Exit          bool   // end the container
	// Pre writes the memory alone while the container runs; the checkpoint of the
	// same name that follows writes what has changed since.
	Pre            bool `json:",omitempty"`
	TCPEstablished bool `json:",omitempty"`
	FileLocks      bool `json:",omitempty"`
	// Volumes are kept with it.
	Volumes bool `json:",omitempty"`
}

// Checkpoint is one that an engine keeps.
type Checkpoint struct {
	Name string
	// Created is zero for a pre-dump that no checkpoint has followed yet.
	Created time.Time `json:",omitzero"`
	Size    int64     `json:",omitempty"` // bytes on the disk
	Rounds  int       `json:",omitempty"`
	Volumes []string  `json:",omitempty"`
}

// RestoreOptions say how a container is made again from a checkpoint: of
// POST /servin/containers/{id}/restore, and as the parameter options of
// POST /servin/checkpoints/import, whose body is the tar.
type RestoreOptions struct {
	// Checkpoint is the name of the engine's own; not for an import.
	Checkpoint string `json:",omitempty"`
	// Name of the new container; "" is the old one's for an import, else one is chosen.
	Name string `json:",omitempty"`
	// KeepAddress asks for the addresses that it had.
	KeepAddress bool `json:",omitempty"`
	// KeepVolumes uses volumes of the same names that are there as they are.
	KeepVolumes bool `json:",omitempty"`
	// NoStart only makes the container, of a cold one.
	NoStart bool `json:",omitempty"`
}

// Restored is their answer.
type Restored struct {
	ID       string
	Name     string
	Running  bool
	Warnings []string `json:",omitempty"`
}
