package dockerapi

import (
	"net/http"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/build"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// What Docker has and this engine answers for without having it: swarm mode,
// plugins of Docker's own kind, and builds inside the daemon.

var errNoManager = fault.New(fault.Unavailable, `This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`)

func noManager(*response, *request) error { return errNoManager }

func notInSwarm(*response, *request) error {
	return fault.New(fault.Unavailable, "This node is not part of a swarm")
}

func noSwarmMode(*response, *request) error {
	return fault.New(fault.Unavailable, "swarm mode is not available: a cluster of this engine is made with the cloudos command")
}

func noPlugins(w *response, _ *request) error { return w.json(http.StatusOK, []struct{}{}) }

func noPlugin(_ *response, r *request) error {
	return fault.New(fault.NotFound, "plugin %q not found", r.name)
}

func pluginsUnsupported(*response, *request) error {
	return fault.New(fault.Unsupported, "cannot install plugins: this engine runs no managed plugins")
}

// pullPlugin refuses what is no request for a plugin as such.
func pullPlugin(w *response, r *request) error {
	var privileges []struct{}
	if err := r.decode(w, &privileges); err != nil {
		return err
	}
	if _, err := reference.ParseNormalizedNamed(r.query.Get("remote")); err != nil {
		return fault.As(fault.Invalid, err)
	}
	return pluginsUnsupported(w, r)
}

// changePlugin is of a plugin that is not there, once the request makes sense.
func changePlugin(w *response, r *request) error {
	var body []any
	if err := r.decode(w, &body); err != nil {
		return err
	}
	return noPlugin(w, r)
}

func noBuilds(*response, *request) error {
	return fault.New(fault.Unsupported, "cannot build: builds come with servin-buildd, which is not installed")
}

func noSession(*response, *request) error {
	return fault.New(fault.Unsupported, "cannot open a build session: builds come with servin-buildd, which is not installed")
}

// pruneBuildCache answers truly: without a builder there is no cache. An error
// would break `docker system prune`.
func pruneBuildCache(w *response, r *request) error {
	if _, err := r.filters(); err != nil {
		return err
	}
	return w.json(http.StatusOK, build.CachePruneReport{})
}
