package host

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// routes is the control API of servin-vmd.
func (h *Host) routes() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) { answer(w, h.status(r.Context())) })
	m.HandleFunc("POST /v1/start", h.operation(func(ctx context.Context, r *http.Request) error {
		_, err := h.up(ctx)
		return err
	}))
	m.HandleFunc("POST /v1/stop", h.operation(func(ctx context.Context, r *http.Request) error {
		return h.stop(ctx, forced(r))
	}))
	m.HandleFunc("POST /v1/restart", h.operation(func(ctx context.Context, r *http.Request) error {
		if err := h.stop(ctx, false); err != nil {
			return err
		}
		_, err := h.up(ctx)
		return err
	}))
	m.HandleFunc("POST /v1/reset", h.operation(func(ctx context.Context, r *http.Request) error { return h.reset(ctx) }))
	m.HandleFunc("PATCH /v1/config", h.change)
	m.HandleFunc("GET /v1/loss", func(w http.ResponseWriter, r *http.Request) { answer(w, h.loss(r.Context())) })
	m.HandleFunc("GET /v1/logs", h.logs)
	m.HandleFunc("POST /v1/console", h.attach)
	m.HandleFunc("POST /v1/quit", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNoContent)
		h.leave()
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 1 || r.Header.Get("Origin") != "" {
			answerError(w, fault.New(fault.Forbidden, "this is no service for browsers"))
			return
		}
		m.ServeHTTP(w, r)
	})
}

// forced says whether an operation pulls the plug, and waits for no turn to come to its end by itself.
func forced(r *http.Request) bool {
	return r.URL.Path == "/v1/reset" || r.URL.Path == "/v1/stop" && r.URL.Query().Get("force") == "1"
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// operation takes a turn and streams its steps. It goes on when the client leaves:
// half a stop is worse than a whole one.
func (h *Host) operation(do func(ctx context.Context, r *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h.used()
		steps := make(chan api.VMProgress, 64)
		h.mu.Lock()
		h.steps[steps] = true
		h.mu.Unlock()
		defer func() {
			h.mu.Lock()
			delete(h.steps, steps)
			h.mu.Unlock()
		}()
		begin := time.Now()
		done := make(chan error, 1)
		ctx := context.WithoutCancel(r.Context())
		h.wg.Add(1)
		go func() {
			defer h.wg.Done()
			if forced(r) {
				defer h.force()()
			}
			if err := h.takeTurn(ctx); err != nil {
				done <- err
				return
			}
			defer h.giveTurn()
			done <- do(ctx, r)
			h.used()
		}()
		w.Header().Set("Content-Type", "application/x-ndjson")
		enc, flush := json.NewEncoder(w), http.NewResponseController(w)
		for {
			select {
			case p := <-steps:
				enc.Encode(p)
				flush.Flush()
			case err := <-done:
				last := api.VMProgress{Done: err == nil, Seconds: time.Since(begin).Seconds()}
				if err != nil {
					last.Error, last.Status = err.Error(), fault.Of(err).Status()
				}
				enc.Encode(last)
				return
			case <-r.Context().Done():
				return
			}
		}
	}
}

// status tells how things are, without waking anybody.
func (h *Host) status(ctx context.Context) api.VMStatus {
	h.mu.Lock()
	st := api.VMStatus{State: h.state, Error: h.fail, Since: h.since, IdleSince: time.Unix(0, h.lastUse.Load()), Socket: h.cfg.Place.Engine(),
		Config: h.config, StartSeconds: h.took}
	st.Config.Shares = slices.Clone(h.config.Shares)
	l := h.live
	h.mu.Unlock()
	if st.Config.Image == "" {
		st.Image = h.cfg.Image
	} else {
		st.Image = st.Config.Image
	}
	if d, err := h.driver(cmp.Or(st.Config.Driver, h.chosen())); err == nil {
		st.Driver = d.Name()
	}
	if fi, err := os.Stat(h.file("data.img")); err == nil {
		st.Disk = api.VMDisk{Size: uint64(fi.Size()), Host: allocated(fi)}
	}
	if l == nil {
		return st
	}
	r := l.machine.Record()
	st.Driver, st.PID, st.Image = r.Driver, l.machine.PID(), l.spec.Image.Dir
	st.Accelerator = l.host.Accelerator
	if l.host.Slow != "" {
		st.Accelerator += " (" + l.host.Slow + ")"
	}
	st.Version, st.Kernel = l.spec.Image.Version, l.spec.Image.KernelVer
	st.Memory.Host = resident(st.PID)
	st.Ports = l.ports.list()
	problems := map[string]string{}
	if p, ok := l.machine.(vm.Reaches); ok {
		for k, v := range p.ShareProblems() {
			problems[k] = v
		}
	}
	l.mu.Lock()
	for k, v := range l.hot {
		problems[k] = v
	}
	for p := range l.pending {
		st.Pending = append(st.Pending, p)
	}
	st.Containers = l.containers
	l.mu.Unlock()
	slices.Sort(st.Pending)
	for _, s := range l.shares() {
		st.Shares = append(st.Shares, api.VMShared{VMShare: s, Error: problems[s.Path]})
	}
	if st.State == api.VMRunning || st.State == api.VMSafe {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		var g vmwire.Status
		if err := l.call(ctx, "GET", "/v1/status", nil, &g); err == nil {
			st.Memory.Guest, st.Memory.Available = g.Memory.Total, g.Memory.Available
			st.Disk.Used = g.Data.Used
		} else if st.Error == "" {
			st.Error = err.Error()
		}
	}
	return st
}

// loss counts what a reset destroys.
func (h *Host) loss(ctx context.Context) api.VMLoss {
	var out api.VMLoss
	if fi, err := os.Stat(h.file("data.img")); err == nil {
		out.DiskBytes = allocated(fi)
	} else if kept, kerr := h.keeps(ctx); kerr != nil || !kept {
		out.Known = kerr == nil && errors.Is(err, os.ErrNotExist) // nothing was ever kept
		return out
	}
	l, err := h.awake(ctx)
	if err != nil {
		return out
	}
	var cs []container.Summary
	var is []image.Summary
	var vs volume.ListResponse
	var ns []network.Summary
	for path, to := range map[string]any{"/containers/json?all=1": &cs, "/images/json": &is, "/volumes": &vs, "/networks": &ns} {
		if err := l.engine(ctx, "GET", path, nil, to); err != nil {
			return out
		}
	}
	out.Known = true
	out.Containers, out.Images, out.Volumes = len(cs), len(is), len(vs.Volumes)
	for _, n := range ns {
		if n.Name != "bridge" && n.Name != "host" && n.Name != "none" {
			out.Networks++
		}
	}
	for _, c := range cs {
		if c.State == container.StateRunning || c.State == container.StatePaused {
			out.Running++
		}
		if len(c.Names) > 0 && len(out.ContainerNames) < 20 {
			out.ContainerNames = append(out.ContainerNames, bounded(c.Names[0]))
		}
	}
	for _, v := range vs.Volumes {
		if len(out.VolumeNames) < 20 {
			out.VolumeNames = append(out.VolumeNames, bounded(v.Name))
		}
	}
	return out
}

// change changes the configuration: kept first, then applied where the machine can.
func (h *Host) change(w http.ResponseWriter, r *http.Request) {
	var ch api.VMChange
	d := json.NewDecoder(io.LimitReader(r.Body, 1<<20))
	d.DisallowUnknownFields()
	if err := d.Decode(&ch); err != nil {
		answerError(w, fault.New(fault.Invalid, "cannot read the change: %w", err))
		return
	}
	if err := h.takeTurn(r.Context()); err != nil {
		answerError(w, err)
		return
	}
	defer h.giveTurn()
	h.mu.Lock()
	old := h.config
	h.mu.Unlock()
	base := old
	if _, err := os.Stat(h.file("data.img")); errors.Is(err, os.ErrNotExist) && ch.DiskGiB != nil {
		base.DiskGiB = 0 // there is no disk yet that could shrink
	}
	c, err := vm.Change(base, ch, h.cfg.Computer)
	if err == nil && ch.Image != nil && *ch.Image != "" {
		_, err = vm.OpenImage(*ch.Image, h.cfg.ImageKeys, nil)
	}
	if err == nil && ch.Driver != nil {
		_, err = h.driver(*ch.Driver)
	}
	if err == nil {
		err = vm.SaveConfig(h.cfg.Place.State, c)
	}
	if err != nil {
		answerError(w, err)
		return
	}
	h.mu.Lock()
	h.config = c
	l, state := h.live, h.state
	h.mu.Unlock()
	out := api.VMChanged{Config: c}
	if l == nil {
		out.Applied = differences(old, c)
	} else {
		out.Applied, out.Pending = h.apply(r.Context(), l, state, old, c)
	}
	answer(w, out)
}

// differences names the settings that differ.
func differences(a, b api.VMConfig) []string {
	var out []string
	for _, d := range []struct {
		name string
		same bool
	}{{"cpus", a.CPUs == b.CPUs}, {"memory", a.MemoryMiB == b.MemoryMiB}, {"disk", a.DiskGiB == b.DiskGiB}, {"shares", slices.Equal(a.Shares, b.Shares)},
		{"idle-time", a.IdleSeconds == b.IdleSeconds}, {"off-time", a.OffSeconds == b.OffSeconds}, {"image", a.Image == b.Image}, {"driver", a.Driver == b.Driver}} {
		if !d.same {
			out = append(out, d.name)
		}
	}
	return out
}

// apply does at once what the running machine can take. The caller has the turn.
func (h *Host) apply(ctx context.Context, l *live, state string, old, c api.VMConfig) (applied, pending []string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	ctx, done := h.waiting(ctx)
	defer done()
	running := state == api.VMRunning
	for _, d := range differences(old, c) {
		ok := false
		switch d {
		case "idle-time", "off-time":
			ok = true
		case "memory":
			b, can := l.machine.(vm.Balloon)
			// Beyond what it was started with, only a restart helps.
			ok = can && running && int64(c.MemoryMiB)<<20 <= l.spec.Memory && b.SetMemory(ctx, int64(c.MemoryMiB)<<20) == nil
		case "disk":
			g, can := l.machine.(vm.Resizer)
			if can && running {
				err := g.GrowDisk(ctx, int64(c.DiskGiB)<<30)
				if err == nil {
					err = l.growInside(ctx)
				}
				if err != nil {
					h.log.Warn("cannot grow the disk of the running machine", "error", err)
				}
				ok = err == nil
			}
		case "shares":
			ok = running && h.share(ctx, l, old.Shares, c.Shares)
		}
		l.mu.Lock()
		if ok {
			applied = append(applied, d)
			delete(l.pending, d)
		} else {
			pending = append(pending, d)
			l.pending[d] = true
		}
		l.mu.Unlock()
	}
	return applied, pending
}

// growInside has the guest take the larger disk. It notices by itself, too, and may be at it.
func (l *live) growInside(ctx context.Context) (err error) {
	for range 20 {
		if err = l.call(ctx, "POST", "/v1/data/grow", nil, nil); err == nil {
			return nil
		}
		time.Sleep(250 * time.Millisecond)
	}
	return err
}

// share adds folders to the running machine; false if something waits for a restart.
func (h *Host) share(ctx context.Context, l *live, old, now []api.VMShare) bool {
	all := true
	for _, s := range old {
		if !slices.Contains(now, s) {
			all = false // a guest keeps what it has
		}
	}
	sharer, can := l.machine.(vm.Sharer)
	for _, s := range now {
		if slices.Contains(old, s) || slices.ContainsFunc(l.spec.Shares, func(o vm.Share) bool { return o.Path == s.Path }) {
			continue
		}
		sh := vm.Share{VMShare: s, Tag: "share" + strconv.Itoa(len(l.spec.Shares))}
		if !can {
			all = false
			continue
		}
		err := sharer.AddShare(ctx, sh)
		if err == nil {
			err = h.mountSoon(ctx, l, sh)
		}
		if err != nil {
			h.log.Warn("cannot share a folder with the running machine", "path", s.Path, "error", err)
			all = false
			continue
		}
		l.mu.Lock()
		l.spec.Shares = append(l.spec.Shares, sh)
		l.mu.Unlock()
		vm.WriteJSON(h.file("machine.json"), l.machine.Record())
	}
	return all
}

// mountSoon mounts a share that the guest is still finding.
func (h *Host) mountSoon(ctx context.Context, l *live, sh vm.Share) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		err := l.mount(ctx, sh)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// logs sends what was written.
func (h *Host) logs(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	which, follow := q.Get("which"), q.Get("follow") == "1"
	lines, err := strconv.Atoi(q.Get("lines"))
	if err != nil || lines < 0 {
		lines = 200
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	switch which {
	case "engine", "init", "kernel":
		_, l := h.now()
		if l == nil {
			answerError(w, fault.New(fault.Conflict, "the machine is off: its console and servin-vmd's log are here ('servin vm logs --source console')"))
			return
		}
		path := fmt.Sprintf("/v1/log?source=%s&tail=%d", which, lines)
		if follow {
			path += "&follow=1"
		}
		_, _, ctl := l.conversation()
		resp, err := open(r.Context(), ctl, "GET", path, nil)
		if err != nil {
			answerError(w, err)
			return
		}
		defer resp.Body.Close()
		copyFlushing(w, resp.Body)
	case "", "console", "vmd":
		path := h.file("console.log")
		if which == "vmd" {
			path = h.cfg.LogFile
		}
		b, err := readTail(path, maxConsole)
		if err != nil {
			answerError(w, err)
			return
		}
		w.Write(lastLines(b, lines))
		if follow {
			h.followFile(r.Context(), w, path)
		}
	default:
		answerError(w, fault.New(fault.Invalid, "there is no log %q: console, kernel, init, engine, vmd", which))
	}
}

func copyFlushing(w http.ResponseWriter, r io.Reader) {
	flush := http.NewResponseController(w)
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return
			}
			flush.Flush()
		}
		if err != nil {
			return
		}
	}
}

// lastLines cuts b to its last n lines.
func lastLines(b []byte, n int) []byte {
	if n == 0 {
		return nil
	}
	seen := 0
	for i := len(b) - 2; i >= 0; i-- {
		if b[i] == '\n' {
			if seen++; seen == n {
				return b[i+1:]
			}
		}
	}
	return b
}

// followFile sends what is appended to a file, over its rotation.
func (h *Host) followFile(ctx context.Context, w http.ResponseWriter, path string) {
	flush := http.NewResponseController(w)
	flush.Flush()
	var off int64
	if fi, err := os.Stat(path); err == nil {
		off = fi.Size()
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.quit:
			return
		case <-tick.C:
		}
		f, err := os.Open(filepath.Clean(path))
		if err != nil {
			continue
		}
		if fi, err := f.Stat(); err == nil && fi.Size() < off {
			off = 0
		}
		n, err := io.Copy(w, io.NewSectionReader(f, off, maxConsole))
		f.Close()
		off += n
		if err != nil || flush.Flush() != nil {
			return
		}
	}
}

// attach makes the connection the machine's serial line.
func (h *Host) attach(w http.ResponseWriter, r *http.Request) {
	_, l := h.now()
	if l == nil {
		answerError(w, fault.New(fault.Conflict, "the machine is off"))
		return
	}
	if _, ok := l.machine.(vm.Console); !ok {
		answerError(w, fault.New(fault.Unsupported, "this driver has no console"))
		return
	}
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		answerError(w, err)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Time{})
	if _, err := io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"); err != nil {
		return
	}
	h.console.attach(l.ctx, struct {
		io.Reader
		io.Writer
	}{buf.Reader, conn})
}
