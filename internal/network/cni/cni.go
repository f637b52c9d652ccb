// Package cni connects network namespaces through CNI plugins (spec 1.1): it
// watches the directory of configuration (conf.go, watch.go), runs chains of
// plugins with limits on their time and output (chain.go, exec.go), and keeps a
// durable record of every attachment (record.go), so that what was set up is
// undone even after the engine or the host has ended. Package network builds
// pods' and containers' networks on it; internal/wire makes the Service.
//
// Vocabulary: a Network is a list of plugins from one file of configuration; an
// attachment is one container's place on one, known by the container's id and
// the name of the interface.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/pkg/utils"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// The places where distributions and network add-ons put things.
const (
	DefaultConfDir = "/etc/cni/net.d"
	DefaultBinDir  = "/opt/cni/bin"
)

// Config makes a Service.
type Config struct {
	// ConfDir holds the configuration (default DefaultConfDir), BinDirs the
	// plugins (default DefaultBinDir).
	ConfDir string
	BinDirs []string
	// Root holds the records of attachments. They outlive a reboot, because what
	// plugins keep (addresses, mostly) does. RunRoot holds the bound namespaces.
	Root, RunRoot string
	Logger        *slog.Logger
	Limits        Limits
}

// Limits bound what plugins may take. Zero values mean the defaults.
type Limits struct {
	// Add, Del and Ask (CHECK, STATUS, VERSION, GC) bound one execution of one
	// plugin: 60s, 20s and 10s.
	Add, Del, Ask time.Duration
	// Grace is what a killed plugin has to end, and what one that a former engine
	// started has to finish (default 5s).
	Grace time.Duration
	// Output bounds what a plugin may write, in bytes (default 1 MiB).
	Output int
	// Parallel bounds the plugins that run at a time (default 16).
	Parallel int
	// RetryFirst and RetryLast are the shortest and longest time between two
	// attempts to undo an attachment whose plugins fail (1s, 1m); after GiveUp
	// (10m) its record is dropped, so that teardown ends.
	RetryFirst, RetryLast, GiveUp time.Duration
}

func (l Limits) filled() Limits {
	for d, v := range map[*time.Duration]time.Duration{
		&l.Add: time.Minute, &l.Del: 20 * time.Second, &l.Ask: 10 * time.Second, &l.Grace: 5 * time.Second,
		&l.RetryFirst: time.Second, &l.RetryLast: time.Minute, &l.GiveUp: 10 * time.Minute,
	} {
		if *d <= 0 {
			*d = v
		}
	}
	if l.Output <= 0 {
		l.Output = 1 << 20
	}
	if l.Parallel <= 0 {
		l.Parallel = 16
	}
	return l
}

// Service runs plugins and keeps attachments. It is safe for concurrent use.
type Service struct {
	cfg  Config
	log  *slog.Logger
	exec *executor
	disk disk
	pins pins
	kick chan struct{} // wakes Run's retries

	confMu     sync.RWMutex
	conf       []*list // valid ones, in the order of their files' names
	wrong      error   // why a file of configuration was left out
	generation atomic.Uint64

	mu    sync.Mutex
	held  map[key]*record // every attachment that has a record
	locks map[string]*lock
	// gates keep GC of a network apart from ADD and DEL on it.
	gates map[string]*semaphore.Weighted
	// collect are networks whose garbage is to be collected.
	collect map[string]bool
	closed  bool

	statusMu sync.Mutex
	status   map[string]verdict
}

// key is the identity of an attachment.
type key struct{ id, ifName string }

var containerID = pattern.New(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`) // of 128 bytes at most

// New reads the records and the configuration. A directory that is not there is
// no configuration, not an error: it may come.
func New(cfg Config) (*Service, error) {
	if cfg.ConfDir == "" {
		cfg.ConfDir = DefaultConfDir
	}
	if len(cfg.BinDirs) == 0 {
		cfg.BinDirs = []string{DefaultBinDir}
	}
	for _, p := range append([]string{cfg.ConfDir, cfg.Root, cfg.RunRoot}, cfg.BinDirs...) {
		if !filepath.IsAbs(p) || strings.Contains(p, string(os.PathListSeparator)) {
			return nil, fault.New(fault.Invalid, "cannot use %q for CNI: an absolute path without colons is wanted", p)
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Limits = cfg.Limits.filled()
	s := &Service{
		cfg: cfg, log: cfg.Logger, kick: make(chan struct{}, 1),
		held: map[key]*record{}, locks: map[string]*lock{}, gates: map[string]*semaphore.Weighted{},
		collect: map[string]bool{}, status: map[string]verdict{},
	}
	s.exec = newExecutor(cfg.Limits)
	var err error
	if s.disk, err = newDisk(cfg.Root); err != nil {
		return nil, err
	}
	if s.pins, err = newPins(filepath.Join(cfg.RunRoot, "netns")); err != nil {
		return nil, err
	}
	recs, bad := s.disk.load()
	for _, r := range recs {
		s.held[key{r.ContainerID, r.IfName}] = r
	}
	for _, err := range bad {
		s.log.Error("a record of a CNI attachment is damaged", "cause", err)
	}
	if err := s.pins.sweep(s.Has); err != nil {
		s.log.Warn("network namespaces that nobody uses stay", "cause", err)
	}
	s.reload()
	return s, nil
}

// Request asks for an attachment.
type Request struct {
	// Owner is who will tell at a restart whether the attachment is still needed.
	Owner       Owner
	ContainerID string
	IfName      string
	// Network is the name of a list of plugins; "" is the default.
	Network string
	// NetNS is the path of the network namespace; or NS is the namespace, which
	// is bound to a path for as long as the container has attachments.
	NetNS string
	NS    *os.File
	// Args become CNI_ARGS.
	Args [][2]string
	Capabilities
	// Extra are capabilities by name, beside or instead of those.
	Extra map[string]json.RawMessage
}

// Owner says for whom an attachment was made.
type Owner string

// The owners of attachments.
const (
	Pods       Owner = "pod"
	Containers Owner = "container"
)

// Add connects a namespace. On failure what the plugins did is undone, at once
// or later by Run.
func (s *Service) Add(ctx context.Context, q Request) (Result, error) {
	if err := q.check(); err != nil {
		return Result{}, err
	}
	l, err := s.pick(q.Network)
	if err != nil {
		return Result{}, err
	}
	if err := q.Capabilities.check(); err != nil {
		return Result{}, err
	}
	unlock, err := s.lock(ctx, q.ContainerID)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return Result{}, fault.New(fault.Unavailable, "cannot connect to CNI network %s: the engine is shutting down", l.Name)
	}
	k := key{q.ContainerID, q.IfName}
	if old := s.get(k); old != nil {
		if old.State == added {
			return Result{}, fault.New(fault.Conflict, "cannot connect %s to CNI network %s: it has an interface %s already", q.ContainerID, l.Name, q.IfName)
		}
		// The rest of an earlier attempt.
		if err := s.undo(ctx, old); err != nil {
			return Result{}, fmt.Errorf("cannot connect to CNI network %s: what is left of an earlier attempt cannot be undone: %w", l.Name, err)
		}
	}
	gate := s.gate(l.Name)
	if err := gate.Acquire(ctx, 1); err != nil {
		return Result{}, err
	}
	defer gate.Release(1)
	if q.NS != nil {
		if q.NetNS, err = s.pins.set(q.ContainerID, q.NS); err != nil {
			return Result{}, err
		}
	}
	r, err := newRecord(q, l)
	if err != nil {
		return Result{}, errors.Join(err, s.unpin(q.ContainerID))
	}
	// Before the first plugin runs, so that a crash leaves something to undo by.
	// The disk may take its time while they run.
	if err := s.disk.write(r); err != nil {
		return Result{}, errors.Join(err, s.disk.drop(r), s.unpin(q.ContainerID))
	}
	s.put(k, r)
	safe := make(chan error, 1)
	go func() { safe <- s.disk.sync(r) }()
	res, err := s.add(ctx, l, r)
	err = errors.Join(err, <-safe)
	if err == nil {
		r.State, r.Result = added, res.raw
		err = s.disk.writeResult(r)
	}
	if err != nil {
		r.State = removing
		if uerr := s.undoGated(context.WithoutCancel(ctx), r); uerr != nil {
			s.log.Warn("a failed CNI attachment could not be undone; it will be tried again", "container", q.ContainerID, "network", l.Name, "cause", uerr)
		}
		return Result{}, fmt.Errorf("cannot connect to CNI network %s: %w", l.Name, err)
	}
	s.put(k, r)
	return res, nil
}

func (q *Request) check() error {
	if len(q.ContainerID) > 128 || !containerID.MatchString(q.ContainerID) {
		return fault.New(fault.Invalid, "cannot connect %q: that is no container id", q.ContainerID)
	}
	if err := utils.ValidateInterfaceName(q.IfName); err != nil {
		return fault.New(fault.Invalid, "cannot name an interface %q: %s", q.IfName, err.Msg)
	}
	if q.NS == nil && !filepath.IsAbs(q.NetNS) {
		return fault.New(fault.Invalid, "cannot connect %s: %q is no path of a network namespace", q.ContainerID, q.NetNS)
	}
	if q.Owner == "" {
		return fault.New(fault.Invalid, "cannot connect %s: nobody owns the attachment", q.ContainerID)
	}
	for _, a := range q.Args {
		if a[0] == "" || strings.ContainsAny(a[0], ";=\x00") || strings.ContainsAny(a[1], ";\x00") {
			return fault.New(fault.Invalid, "cannot pass %q=%q to CNI plugins: semicolons are not allowed", a[0], a[1])
		}
	}
	return nil
}

// Del undoes all attachments of a container. It succeeds where there are none.
// It ends in bounded time: what plugins fail to undo is tried again by Run, and
// given up after Limits.GiveUp; until then calling again says what is wrong.
func (s *Service) Del(ctx context.Context, id string) error { return s.del(ctx, id, "") }

// DelInterface undoes one attachment.
func (s *Service) DelInterface(ctx context.Context, id, ifName string) error {
	return s.del(ctx, id, ifName)
}

func (s *Service) del(ctx context.Context, id, ifName string) error {
	if len(s.attachments(id)) == 0 {
		return nil
	}
	unlock, err := s.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	var errs error
	for _, r := range s.attachments(id) {
		if ifName == "" || r.IfName == ifName {
			errs = errors.Join(errs, s.undo(ctx, r))
		}
	}
	return errs
}

// Check asks the plugins whether a container's attachments stand as they were
// made. Plugins that cannot tell (before spec 0.4.0, or disableCheck) are not
// asked.
func (s *Service) Check(ctx context.Context, id string) error {
	unlock, err := s.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	var errs error
	for _, r := range s.attachments(id) {
		if r.State == added {
			errs = errors.Join(errs, s.check(ctx, r))
		}
	}
	return errs
}

// Has tells whether a container has attachments.
func (s *Service) Has(id string) bool { return len(s.attachments(id)) > 0 }

// Results are what a container's attachments came to be, by interface.
func (s *Service) Results(id string) map[string]Result {
	out := map[string]Result{}
	for _, r := range s.attachments(id) {
		if r.State != added {
			continue
		}
		if res, err := decodeResult(r.Result); err == nil {
			res.Network = r.Network
			out[r.IfName] = res
		}
	}
	return out
}

// Restore undoes the attachments of an owner whose containers are not live;
// slowly and in the background, by Run. It is called once, before the first Add
// for the owner.
func (s *Service) Restore(owner Owner, live func(id string) bool) {
	s.mu.Lock()
	for _, r := range s.held {
		if r.Owner == owner && r.State == added && !live(r.ContainerID) {
			r.State = removing
		}
	}
	s.mu.Unlock()
	s.wake()
}

// CollectSoon lets Run collect the garbage of a network (see Collect) when it
// has undone what it has to.
func (s *Service) CollectSoon(network string) {
	s.mu.Lock()
	s.collect[network] = true
	s.mu.Unlock()
	s.wake()
}

// attachments are copies of a container's records, by interface.
func (s *Service) attachments(id string) []*record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*record
	for k, r := range s.held {
		if k.id == id {
			c := *r
			out = append(out, &c)
		}
	}
	slices.SortFunc(out, func(a, b *record) int { return strings.Compare(a.IfName, b.IfName) })
	return out
}

func (s *Service) get(k key) *record {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.held[k]; r != nil {
		c := *r
		return &c
	}
	return nil
}

// put keeps a copy, so that nobody changes what others look at.
func (s *Service) put(k key, r *record) {
	c := *r
	s.mu.Lock()
	s.held[k] = &c
	s.mu.Unlock()
}

func (s *Service) forget(r *record) error {
	err := s.disk.drop(r)
	s.mu.Lock()
	delete(s.held, key{r.ContainerID, r.IfName})
	s.mu.Unlock()
	return errors.Join(err, s.unpin(r.ContainerID))
}

// unpin gives up the namespace of a container without attachments. The caller
// has the container's turn.
func (s *Service) unpin(id string) error {
	if s.Has(id) {
		return nil
	}
	return s.pins.drop(id)
}

// Destroy undoes every attachment, for the end of an engine that leaves no
// trace. What plugins fail to undo stays on record.
func (s *Service) Destroy(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	ids := map[string]bool{}
	for k := range s.held {
		ids[k.id] = true
	}
	s.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(s.cfg.Limits.Parallel)
	var mu sync.Mutex
	var errs error
	for id := range ids {
		g.Go(func() error {
			err := s.Del(ctx, id)
			mu.Lock()
			errs = errors.Join(errs, err)
			mu.Unlock()
			return nil
		})
	}
	_ = g.Wait()
	return errors.Join(errs, s.pins.sweep(func(string) bool { return false }))
}
