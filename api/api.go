// Package api holds the wire types of our own routes under /servin/. The rest
// of the API is Docker's (github.com/moby/moby/api). It imports nothing of ours.
package api

import (
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// DefaultSocket is where the engine of the host listens.
const DefaultSocket = "/run/servin/servin.sock"

// CreateExtra is what a create request can carry beyond Docker's fields. In the
// Docker routes it travels in the labels "io.servin.*" of the request.
type CreateExtra struct {
	// RestartUnhealthy restarts the container when its health check fails.
	RestartUnhealthy bool `json:",omitempty"`
	// PublishThrough lets published ports bypass the host's input rules.
	PublishThrough bool `json:",omitempty"`
	// UsernsAuto gives the container its own range of host ids. Docker's
	// HostConfig.UsernsMode "auto" means the same.
	UsernsAuto bool `json:",omitempty"`
	// Secrets and configs that the container gets as files in memory.
	Secrets []SecretRef `json:",omitempty"`
	// Debug names a container to look into: the new one, which is removed when it
	// ends, joins its namespaces and sees its files at /target. In POST
	// /servin/run alone; no image means the engine's own tools.
	Debug string `json:",omitempty"`
}

// LabelDebug is on a container that looks into another, whose id it holds.
const LabelDebug = "io.servin.debug"

// LabelLease has a container, network or volume removed when nobody holds the
// lease that it names any more (POST /servin/lease).
const LabelLease = "io.servin.lease"

// ToolboxImage is the engine's own tools.
const ToolboxImage = "servin/toolbox:latest"

// Labels that carry CreateExtra through Docker's clients and Compose files.
const (
	LabelRestartUnhealthy = "io.servin.restart-unhealthy"
	LabelPublishThrough   = "io.servin.publish-through"
)

// LabelPod marks containers of Kubernetes' pods in lists: "namespace/name" of the pod.
const LabelPod = "io.servin.pod.name"

// RunRequest is the body of POST /servin/run: create, attach and start in one
// round trip. The connection is upgraded (Upgrade: tcp). The server first sends
// one frame of stream type 3 holding a RunStarted, then output frames (stream
// types 1 and 2, Docker's 8-byte header; with a terminal too), last a frame of
// stream type 3 holding a RunExited. The client writes standard input raw and
// half-closes at its end.
type RunRequest struct {
	Name       string                    `json:",omitempty"`
	Platform   string                    `json:",omitempty"`
	Config     *container.Config         `json:"Config"`
	HostConfig *container.HostConfig     `json:",omitempty"`
	Networking *network.NetworkingConfig `json:"NetworkingConfig,omitempty"`
	Extra      CreateExtra               `json:"Extra,omitzero"`
	Stdin      bool                      `json:",omitempty"`
	Stdout     bool                      `json:",omitempty"`
	Stderr     bool                      `json:",omitempty"`
	DetachKeys string                    `json:",omitempty"`
}

// RunStarted is the first control frame of a run; of an exec
// (POST /servin/containers/{name}/exec) the id is the exec's.
type RunStarted struct {
	ID       string
	Warnings []string `json:",omitempty"`
	// Error is set when create or start failed; Status is the HTTP status it
	// would have had, ExitCode what a command line should exit with (125, 126, 127).
	Error    string `json:",omitempty"`
	Status   int    `json:",omitempty"`
	ExitCode int    `json:",omitempty"`
}

// RunExited is the last control frame of a run.
type RunExited struct {
	ExitCode int
	Error    string `json:",omitempty"`
	// Detached is set when the client typed the detach keys; the container goes
	// on and ExitCode means nothing.
	Detached bool `json:",omitempty"`
}

// Finding is one result of GET /servin/doctor.
type Finding struct {
	Severity string // "ok", "info", "warning", "error"
	Title    string
	Detail   string `json:",omitempty"`
	Fix      string `json:",omitempty"`
	// Action is what the engine itself can do about it, when asked to by
	// POST /servin/doctor/fix.
	Action string `json:",omitempty"`
}

// FixRequest is the body of POST /servin/doctor/fix: the actions that the user
// was shown and agreed to. No other is carried out.
type FixRequest struct {
	Actions []string
}

// FixReport is its answer: what was done.
type FixReport struct {
	Done []string
}

// PruneRequest is the body of POST /servin/prune.
type PruneRequest struct {
	All     bool                       `json:",omitempty"` // images that no container uses, not only untagged ones
	Volumes bool                       `json:",omitempty"`
	Filters map[string]map[string]bool `json:",omitempty"`
}

// PruneReport is its answer.
type PruneReport struct {
	Containers, Networks, Volumes, Images []string
	BuildCache                            []string `json:",omitempty"`
	SpaceReclaimed                        uint64
}

// ShutdownRequest is the body of POST /servin/shutdown. The answer, 204, comes
// when what it asks for is done, right before the daemon leaves.
type ShutdownRequest struct {
	// Containers ends all containers too and removes every trace of the engine
	// but the files under its root. Without it containers go on.
	Containers bool `json:",omitempty"`
}

// Health is the answer of GET /servin/health. It never waits for anything: no
// answer means that the engine does not serve requests.
type Health struct {
	Status  string // "ok"; "degraded" with Problems
	Version string
	Pid     int
	// Problems say what runs worse than it should, such as lazily pulled layers
	// whose registry cannot be reached.
	Problems []string `json:",omitempty"`
}

// Root names the engine's API prefix for our own routes.
const Root = "/servin"
