// Package daemon is the process around an engine: listeners, signals, readiness,
// memory. cmd/servind calls it; it imports the composition root's pieces through
// its Config alone.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/internal/dockerapi"
)

// Config of a daemon.
type Config struct {
	Listen  []string
	Options dockerapi.ListenOptions
	Handler http.Handler
	// Metrics is host:port of a listener for GET /metrics alone, "" none; for
	// whoever can connect there, without a question. WriteMetrics answers it.
	Metrics      string
	WriteMetrics func(ctx context.Context, w io.Writer) error
	// Debug is unix:///path of a socket for profiles of this process, "" none.
	Debug string
	// Reload, if set, is called on SIGHUP.
	Reload func() error
	// Stop ends the daemon from inside (POST /servin/shutdown).
	Stop   <-chan struct{}
	Logger *slog.Logger
}

// Serve opens the listeners and serves until ctx, a signal or Stop ends it.
func Serve(ctx context.Context, c Config) error {
	ctx, cancel := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	var ls []net.Listener
	defer func() {
		for _, l := range ls {
			_ = l.Close()
		}
	}()
	for _, addr := range c.Listen {
		if p, ok := strings.CutPrefix(addr, "unix://"); ok {
			if err := os.MkdirAll(filepath.Dir(p), 0o711); err != nil {
				return err
			}
		}
		l, err := dockerapi.Listen(addr, c.Options)
		if err != nil {
			return err
		}
		ls = append(ls, l)
		c.Logger.Info("listening", "address", addr)
	}
	if c.Metrics != "" {
		l, err := net.Listen("tcp", c.Metrics)
		if err != nil {
			return fmt.Errorf("cannot serve metrics: %w", err)
		}
		mux := http.NewServeMux()
		mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			_ = c.WriteMetrics(r.Context(), w)
		})
		srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
		defer srv.Close()
		go func() { _ = srv.Serve(l) }()
		c.Logger.Info("serving metrics", "address", l.Addr().String())
	}
	if c.Debug != "" {
		l, err := listenDebug(c.Debug)
		if err != nil {
			return err
		}
		srv := &http.Server{Handler: debugHandler(), ReadHeaderTimeout: 10 * time.Second}
		defer srv.Close()
		go func() { _ = srv.Serve(l) }()
	}
	if c.Stop != nil {
		go func() {
			select {
			case <-c.Stop:
				// The answer to the request that asked for it goes out first.
				time.Sleep(50 * time.Millisecond)
				cancel()
			case <-ctx.Done():
			}
		}()
	}
	if c.Reload != nil {
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
		go func() {
			for {
				select {
				case <-hup:
					_ = c.Reload() // it logs what is wrong
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	notifyReady()
	go settle(ctx)
	return dockerapi.Serve(ctx, ls, c.Handler)
}

// notifyReady tells a service manager, as sd_notify(3) does.
func notifyReady() {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if path[0] == '@' {
		path = "\x00" + path[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte("READY=1\n"))
}

// Memory settings. A daemon lives long and is mostly idle: a small heap is worth
// a few more collections.
const (
	gcPercent   = 50
	memoryLimit = 192 << 20 // soft: beyond it collections get frequent
	trimEvery   = 10 * time.Second
	startFor    = 5 * time.Second // after the first listener is open
)

// TuneMemory sets the limit; the environment (GOGC, GOMEMLIMIT) wins. Nothing is collected
// until settle: what a start allocates mostly stays, and half a dozen collections of a small
// heap were a good part of a start's work.
func TuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(-1)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}

// settle ends the start: when the first requests have had their time, collections begin.
func settle(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(startFor):
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	trim(ctx)
}

// trim gives memory back to the system once a burst of work is over: when the
// daemon allocated since the last look, but not much in the latest period.
func trim(ctx context.Context) {
	t := time.NewTicker(trimEvery)
	defer t.Stop()
	var ms runtime.MemStats
	var trimmed uint64
	runtime.ReadMemStats(&ms)
	last := ms.TotalAlloc // what the start took makes no period a busy one
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		runtime.ReadMemStats(&ms)
		busy := ms.TotalAlloc-last > 4<<20
		last = ms.TotalAlloc
		if busy || ms.TotalAlloc-trimmed < 1<<20 {
			continue
		}
		debug.FreeOSMemory()
		unmapProgram()
		runtime.ReadMemStats(&ms)
		last, trimmed = ms.TotalAlloc, ms.TotalAlloc
	}
}

// Logger makes the daemon's own log: JSON lines on standard error.
func Logger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, errors.New("cannot use log level " + level + ": write debug, info, warn or error")
	}
	return slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}
