package dockerapi

import (
	"context"
	"errors"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/cloudos-io/cloudos/internal/audit"
)

// statusGone is noted where the client left before it was answered.
const statusGone = 499

// audited carries a call out and records it: before, who asked; behind, what came
// of it. Bodies are not recorded, and of queries only what is known to be no secret.
func (s *server) audited(w *response, r *request, c *compiled) (err error) {
	if s.audit == nil {
		return c.handle(w, r)
	}
	e, err := s.audit.Begin(r.Context(), audit.Call{
		Method: c.method + " " + c.pattern, Object: r.name, Attrs: r.told(), Read: reads(c),
	})
	if err != nil {
		return err
	}
	r.entry, w.entry = e, e
	done := false
	defer func() {
		if !done {
			e.End(http.StatusInternalServerError, errors.New("panic"))
		}
	}()
	err = c.handle(w, r)
	done = true
	status := w.status
	switch {
	case err != nil && !w.began:
		status = statusOf(err)
		if errors.Is(err, context.Canceled) {
			status = statusGone
		}
	case status == 0:
		status = http.StatusOK
	}
	noted := err
	if err != nil && strings.HasPrefix(c.pattern, "/servin/secrets") || c.pattern == "/auth" && err != nil {
		noted = errors.New("refused") // its text is not ours to keep
	}
	e.End(status, noted)
	return err
}

// reads tells whether a route changes nothing and shows no secret. What takes
// content out of containers and volumes, and configs' values, is recorded as
// changes are.
func reads(c *compiled) bool {
	switch strings.Replace(c.pattern, "{name}", "{id}", 1) {
	case "/containers/{id}/wait", "/containers/{id}/resize", "/exec/{id}/resize", "/_ping", "/servin/policy/check", "/servin/policy/test":
		return true
	case "/containers/{id}/archive", "/containers/{id}/export", "/servin/volumes/{id}/backup", "/servin/volumes/{id}/export",
		"/servin/configs/{id}", "/containers/{id}/attach/ws":
		return c.method == http.MethodHead
	}
	return c.method == http.MethodGet || c.method == http.MethodHead
}

// shownQueries are parameters that hold nothing to hide.
var shownQueries = []string{
	"name", "force", "v", "link", "signal", "t", "h", "w", "tag", "repo", "fromImage", "fromSrc", "platform", "container", "condition", "path",
	"replace", "devices", "pause", "all", "since", "until", "containers", "noprune",
	"url", "unsigned", "downgrade", "reboot", "networkmode",
}

// told is what the query says, as far as it may be shown.
func (r *request) told() map[string]string {
	if len(r.query) == 0 {
		return nil
	}
	var out map[string]string
	for _, k := range shownQueries {
		v := r.query.Get(k)
		if v == "" {
			continue
		}
		if k == "fromSrc" || k == "url" { // an address may hold a password
			if _, rest, ok := strings.Cut(v, "://"); ok {
				v = rest[strings.LastIndexByte(rest, '@')+1:]
			}
			v, _, _ = strings.Cut(v, "?")
		}
		if out == nil {
			out = map[string]string{}
		}
		out[k] = v
	}
	return out
}

// noteCreate records what a container was asked to be: never its environment or
// arguments.
func (r *request) noteCreate(c *CreateRequest) {
	if r.entry == nil {
		return
	}
	e := r.entry
	e.Note("name", c.Name)
	e.Note("debug", c.Extra.Debug)
	if c.Config != nil {
		e.Note("image", c.Config.Image)
		e.Note("user", c.Config.User)
	}
	hc := c.HostConfig
	if hc == nil {
		return
	}
	yes := func(key string, on bool) {
		if on {
			e.Note(key, "true")
		}
	}
	yes("privileged", hc.Privileged)
	yes("publishThrough", c.Extra.PublishThrough)
	e.Note("capAdd", strings.Join(hc.CapAdd, ","))
	e.Note("network", string(hc.NetworkMode))
	e.Note("pid", string(hc.PidMode))
	e.Note("ipc", string(hc.IpcMode))
	e.Note("uts", string(hc.UTSMode))
	e.Note("userns", string(hc.UsernsMode))
	e.Note("runtime", hc.Runtime)
	var binds, devices, opts, secrets []string
	binds = append(binds, hc.Binds...)
	for _, m := range hc.Mounts {
		if m.Type == mount.TypeBind {
			binds = append(binds, m.Source+":"+m.Target)
		}
	}
	for _, d := range hc.Devices {
		devices = append(devices, d.PathOnHost)
	}
	for _, o := range hc.SecurityOpt {
		k, v, _ := strings.Cut(o, "=")
		if len(v) > 64 { // a profile
			v = "profile"
		}
		opts = append(opts, k+"="+v)
	}
	for _, s := range c.Extra.Secrets {
		secrets = append(secrets, string(s.Kind)+":"+s.Name)
	}
	e.Note("binds", strings.Join(binds, ","))
	e.Note("devices", strings.Join(devices, ","))
	e.Note("securityOpt", strings.Join(opts, ","))
	e.Note("secrets", strings.Join(secrets, ","))
}

// noteExec records what is to be executed, without its arguments.
func (r *request) noteExec(x *container.ExecCreateRequest) {
	if r.entry == nil {
		return
	}
	if len(x.Cmd) > 0 {
		r.entry.Note("command", path.Base(x.Cmd[0]))
		r.entry.Note("arguments", strconv.Itoa(len(x.Cmd)-1))
	}
	r.entry.Note("user", x.User)
	if x.Privileged {
		r.entry.Note("privileged", "true")
	}
}

// auditAPI shows the log.
type auditAPI struct{ l *audit.Log }

func (a auditAPI) read(w *response, r *request) error {
	since, err := r.moment("since")
	if err != nil {
		return err
	}
	follow := r.flag("follow")
	wait := time.Duration(0)
	if follow {
		wait = patience
	}
	s := newStream(w, typeJSONLines, wait)
	defer s.end()
	err = a.l.Read(r.Context(), since, follow, func(line []byte) error {
		if follow {
			return s.send(line)
		}
		_, err := s.Write(line)
		return err
	})
	if err == nil {
		s.begin()
	}
	return err
}

func (a auditAPI) verify(w *response, r *request) error {
	rep, err := a.l.Verify(r.Context())
	if err != nil {
		return err
	}
	rep.Problems = nonNil(rep.Problems)
	return w.json(http.StatusOK, rep)
}
