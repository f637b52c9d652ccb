// Command servind is the Servin container engine's daemon.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/spf13/pflag"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/criu"
	"github.com/cloudos-io/cloudos/internal/daemon"
	"github.com/cloudos-io/cloudos/internal/daemon/await"
	"github.com/cloudos-io/cloudos/internal/dockerapi"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/image/unpack"
	"github.com/cloudos-io/cloudos/internal/network/dhcp"
	"github.com/cloudos-io/cloudos/internal/rootless"
	"github.com/cloudos-io/cloudos/internal/shim"
	"github.com/cloudos-io/cloudos/internal/wire"
)

func main() {
	if len(os.Args) > 0 && os.Args[0] == unpack.Argv0 {
		os.Exit(unpack.Main(os.Args)) // a child of ours that unpacks a layer
	}
	if code, ours := image.LazyMain(); ours {
		os.Exit(code) // the process that serves lazily pulled layers
	}
	if code, ours := dhcp.Main(); ours {
		os.Exit(code) // the process that renews containers' leases
	}
	if code, ours := criu.Main(); ours {
		os.Exit(code) // the process that brings a container back
	}
	daemon.TuneMemory()
	args, ready, ordered, err := await.Wait(os.Args[1:])
	if err == nil && !ordered {
		return
	}
	if err == nil {
		err = run(context.Background(), args, ready)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "servind:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, ready <-chan struct{}) error {
	c, err := configure(args)
	if errors.Is(err, pflag.ErrHelp) || errors.Is(err, errVersion) {
		return nil
	}
	if err != nil {
		return err
	}
	if rootless.Needed() {
		return enterRootless(c)
	}
	log, err := daemon.Logger(c.LogLevel)
	if err != nil {
		return err
	}
	slog.SetDefault(log)
	inside := rootless.Inside()
	if inside.Active {
		if err := rootless.Prepare(c.RunRoot); err != nil {
			log.Warn(err.Error())
		}
	}
	group := wire.SocketGroup(c)
	if inside.Active {
		group = "" // an ordinary user's engine is that user's alone
	}
	s, err := wire.New(ctx, c, inside, ready, log)
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	var once sync.Once
	all := false
	s.Engine.OnShutdown(func(containers bool) { once.Do(func() { all = containers; close(stop) }) })
	err = s.Run(ctx, func(ctx context.Context) error {
		return daemon.Serve(ctx, daemon.Config{
			Listen: c.Listen, Metrics: c.Metrics, WriteMetrics: s.Engine.SystemService().Metrics, Debug: c.Debug, Handler: s.Handler, Stop: stop, Reload: s.Reload, Logger: log,
			Options: dockerapi.ListenOptions{Group: group, CA: c.TLS.CA, Cert: c.TLS.Cert, Key: c.TLS.Key, InsecureTCP: c.InsecureTCP},
		})
	})
	select {
	case <-stop:
		if all {
			err = errors.Join(err, image.DetachLazy(filepath.Join(c.Root, "images")))
		}
		if all && inside.Active {
			err = errors.Join(err, rootless.Leave(c.RunRoot))
		}
	default:
	}
	return err
}

var errVersion = errors.New("version was asked for")

// configure reads flags and the document they name; flags win.
func configure(args []string) (*config.Config, error) {
	f := pflag.NewFlagSet("servind", pflag.ContinueOnError)
	f.SortFlags = false
	f.SetOutput(io.Discard)
	path := f.String("config", "", "configuration document (default /etc/servin/servind.yaml if it exists)")
	root := f.String("root", "", "directory of what is kept (default /var/lib/servin)")
	runRoot := f.String("run-root", "", "directory of what a reboot may take (default /run/servin)")
	listen := f.StringArray("listen", nil, "unix:///path or tcp://host:port, may be repeated (default unix://"+api.DefaultSocket+")")
	cri := f.String("cri", "", "socket for a kubelet: unix:///path")
	insecure := f.Bool("insecure-tcp", false, "permit tcp without TLS on a loopback address")
	cert := f.String("tls-cert", "", "certificate of the tcp listener, PEM")
	key := f.String("tls-key", "", "its key, PEM")
	ca := f.String("tls-ca", "", "authority that clients' certificates must be signed by, PEM")
	group := f.String("group", "", "group that may use the unix socket (default servin if it exists)")
	level := f.String("log-level", "", "debug, info, warn or error (default info)")
	pool := f.Int("pool", -1, "how many sandboxes are kept ready for each kind in use (default 8)")
	metrics := f.String("metrics", "", "host:port that serves GET /metrics alone, for Prometheus (default: only on the listeners)")
	debugAt := f.String("debug", "", "unix:///path of a socket, root's alone, that serves profiles of this process (go tool pprof)")
	version := f.Bool("version", false, "print the version")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Printf("Usage: servind [flags]\n\nThe Servin container engine.\n\n%s", f.FlagUsages())
		}
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if *version {
		fmt.Println("servind", api.Version)
		return nil, errVersion
	}
	c := new(config.Config)
	if *path == "" {
		if _, err := os.Stat(defaultConfig); err == nil && !rootless.Needed() && !rootless.Inside().Active {
			*path = defaultConfig
		}
	}
	if *path != "" {
		var err error
		if c, err = config.Load(*path); err != nil {
			return nil, err
		}
	}
	set := func(to *string, v string) {
		if v != "" {
			*to = v
		}
	}
	set(&c.Root, *root)
	set(&c.RunRoot, *runRoot)
	set(&c.CRI, *cri)
	set(&c.TLS.Cert, *cert)
	set(&c.TLS.Key, *key)
	set(&c.TLS.CA, *ca)
	set(&c.SocketGroup, *group)
	set(&c.LogLevel, *level)
	set(&c.Metrics, *metrics)
	set(&c.Debug, *debugAt)
	if len(*listen) > 0 {
		c.Listen = *listen
	}
	if *insecure {
		c.InsecureTCP = true
	}
	if *pool >= 0 {
		c.Pool = pool
	}
	c.Defaults(rootless.Needed() || rootless.Inside().Active)
	return c, c.Check()
}

const defaultConfig = "/etc/servin/servind.yaml"

// enterRootless replaces this process by itself inside the user's namespaces.
func enterRootless(c *config.Config) error {
	x, err := shim.NewExecutable()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// Inside, the user is another one: the places are settled here.
	if err := os.Setenv("XDG_RUNTIME_DIR", api.UserRuntimeDir()); err != nil {
		return err
	}
	return rootless.Enter(rootless.Config{
		RunRoot: c.RunRoot, Shim: x.Path(), Args: append([]string{self}, os.Args[1:]...),
		Warn: func(s string) { fmt.Fprintln(os.Stderr, "servind: note:", s) },
	})
}
