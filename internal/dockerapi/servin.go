package dockerapi

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// servinAPI serves our own routes.
type servinAPI struct {
	containers Containers
	sys        System
	version    string
	problems   func() []string
	builds     Builds
}

// run is POST /servin/run: one decode, one call of the engine, then frames. The
// answer's header and its first frame leave in one write.
func (a servinAPI) run(w *response, r *request) error {
	var body api.RunRequest
	if err := r.decode(w, &body); err != nil {
		return err
	}
	name, err := containerName(body.Name)
	if err != nil {
		return err
	}
	if body.Config == nil {
		return fault.New(fault.Invalid, "config cannot be empty in order to create a container")
	}
	if shell := strings.HasSuffix(r.URL.Path, debugShellRun); shell != (body.Extra.Debug == debugshell.Target) {
		return fault.New(fault.Invalid, "a shell on the machine is opened by POST %s, and nothing else is", debugShellRun)
	}
	keys, err := parseDetachKeys(body.DetachKeys)
	if err != nil {
		return err
	}
	c := &created{CreateRequest: CreateRequest{
		Name: name, APIVersion: MaxAPIVersion,
		Config: body.Config, HostConfig: body.HostConfig, Networking: body.Networking,
	}}
	if c.Platform, err = parsePlatform(body.Platform); err != nil {
		return err
	}
	if err := c.complete(); err != nil {
		return err
	}
	if err := c.adapt(maxVersion); err != nil {
		return err
	}
	if err := c.interfaceSysctls(maxVersion); err != nil {
		return err
	}
	c.emptyBindings(maxVersion)
	c.Extra.RestartUnhealthy = c.Extra.RestartUnhealthy || body.Extra.RestartUnhealthy
	c.Extra.PublishThrough = c.Extra.PublishThrough || body.Extra.PublishThrough
	c.Extra.UsernsAuto = c.Extra.UsernsAuto || body.Extra.UsernsAuto
	c.Extra.Secrets = append(c.Extra.Secrets, body.Extra.Secrets...)
	c.Extra.Debug = body.Extra.Debug

	r.noteCreate(&c.CreateRequest)
	run, err := a.containers.ContainerRun(r.Context(), c.CreateRequest, AttachRequest{
		Stdin: body.Stdin, Stdout: body.Stdout, Stderr: body.Stderr, Stream: true, DetachKeys: body.DetachKeys,
	})
	run.Warnings = append(run.Warnings, c.warnings...)
	return frames(w, r, run, keys, err)
}

// exec is POST /servin/containers/{id}/exec: the creation of an exec, its start
// and its end in one exchange, told as a run's are.
func (a servinAPI) exec(w *response, r *request) error {
	var req container.ExecCreateRequest
	if err := r.decode(w, &req); err != nil {
		return err
	}
	if err := checkExec(&req); err != nil {
		return err
	}
	keys, err := parseDetachKeys(req.DetachKeys)
	if err != nil {
		return err
	}
	r.noteExec(&req)
	run, err := a.containers.ContainerExec(r.Context(), r.name, req)
	return frames(w, r, run, keys, err)
}

// frames answers with what became of a run, its output and its end. The header
// and the first frame leave in one write.
func frames(w *response, r *request, run RunningContainer, keys []byte, err error) error {
	started := api.RunStarted{ID: run.ID, Warnings: run.Warnings}
	r.entry.Note("id", run.ID)
	if err != nil {
		started.Error, started.Status, started.ExitCode = err.Error(), statusOf(err), fault.ExitCode(err)
	}
	first, merr := json.Marshal(started)
	if merr != nil {
		return merr
	}
	d, herr := takeOver(w)
	if herr != nil {
		if run.Streams.Close != nil {
			_ = run.Streams.Close()
		}
		return herr
	}
	defer d.finish()
	werr := d.accept(true, contentTypeMultiplexed, w.Header(), appendFrame(nil, frameSystem, first))
	if err != nil {
		return err
	}
	if werr != nil {
		d.gone.Store(true)
	}
	ctx, cancel := r.streaming()
	defer cancel()
	res, told := d.pump(ctx, run.Streams, true, keys, run.Wait)
	exited := api.RunExited{Detached: d.detached.Load(), ExitCode: int(res.StatusCode)}
	switch {
	case res.Error != nil:
		exited.Error = res.Error.Message
	case !told && !exited.Detached:
		return nil // the client is gone, or the daemon leaves: the container's end is not told
	}
	last, merr := json.Marshal(exited)
	if merr != nil {
		return merr
	}
	_, _ = d.Write(appendFrame(nil, frameSystem, last))
	return nil
}

// health answers as long as the process serves requests. It takes no lock.
func (a servinAPI) health(w *response, _ *request) error {
	h := api.Health{Status: "ok", Version: a.version, Pid: os.Getpid()}
	if a.problems != nil {
		if h.Problems = a.problems(); len(h.Problems) > 0 {
			h.Status = "degraded"
		}
	}
	return w.json(http.StatusOK, h)
}

func (a servinAPI) doctor(w *response, r *request) error {
	l, err := a.sys.Doctor(r.Context())
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, nonNil(l))
}

func (a servinAPI) fix(w *response, r *request) error {
	var o api.FixRequest
	if err := r.decode(w, &o); err != nil {
		return err
	}
	rep, err := a.sys.Fix(r.Context(), o)
	if err != nil {
		return err
	}
	rep.Done = nonNil(rep.Done)
	return w.json(http.StatusOK, rep)
}

func (a servinAPI) prune(w *response, r *request) error {
	var o api.PruneRequest
	if err := r.decode(w, &o); err != nil {
		return err
	}
	rep, err := a.sys.Prune(r.Context(), o)
	if err != nil {
		return err
	}
	if err := pruneCache(r.Context(), a.builds, o, &rep); err != nil {
		return err
	}
	return w.json(http.StatusOK, rep)
}

// shutdownLimit bounds how long containers may take to end.
const shutdownLimit = 2 * time.Minute

// shutdown goes on if the client leaves: half a shutdown is worse than either.
func (a servinAPI) shutdown(w *response, r *request) error {
	var o api.ShutdownRequest
	if err := r.decode(w, &o); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), shutdownLimit)
	defer cancel()
	if err := a.sys.Shutdown(ctx, o.Containers || r.flag("containers")); err != nil {
		return err
	}
	return w.noContent()
}

func (a servinAPI) drained(w *response, r *request) error {
	if err := a.sys.PoolDrained(r.Context(), r.flag("full")); err != nil {
		return err
	}
	return w.noContent()
}

// metrics are for who may use the API as a whole: not on a plain TCP listener,
// where a page of the same machine could guess at them.
func (a servinAPI) metrics(w *response, r *request) error {
	if r.TLS == nil && !isUnix(r.Request) {
		return fault.New(fault.Forbidden, "metrics are served on the unix socket and over TLS alone")
	}
	if !strings.HasPrefix(r.URL.Path, "/metrics") {
		return errNoPage
	}
	s := newStream(w, "text/plain; version=0.0.4; charset=utf-8", 0)
	defer s.end()
	if err := a.sys.Metrics(r.Context(), s); err != nil {
		return err
	}
	s.begin()
	return nil
}
