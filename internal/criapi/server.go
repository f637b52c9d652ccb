package criapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/audit"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Config of a Server.
type Config struct {
	Engine Engine
	Images Images
	// Socket is where it listens, unix:///path.
	Socket string
	// TCP, if set, is a loopback address and port where it listens too. Clients
	// must present a certificate that CA signed.
	TCP           string
	Cert, Key, CA string
	Version       string
	// Audit records calls; nil records none.
	Audit  *audit.Log
	Logger *slog.Logger
}

// Server answers the CRI. It implements v1's RuntimeService and ImageService.
type Server struct {
	v1.UnimplementedRuntimeServiceServer
	v1.UnimplementedImageServiceServer

	cfg       Config
	log       *slog.Logger
	grpc      []*grpc.Server
	listeners []net.Listener
	streaming streamer
	edges     edgeCache
	rates     rates
	users     userCache
}

// maxMessage is what the kubelet uses, for both directions.
const maxMessage = 16 << 20

// New makes a server that does not listen yet.
func New(c Config) *Server {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: c, log: c.Logger}
	s.edges.m = map[string]edge{}
	s.rates.m = map[string]reading{}
	s.users.m = map[string]imageUser{}
	s.streaming.s = s
	return s
}

// Listen opens the sockets.
func (s *Server) Listen() (err error) {
	defer func() {
		if err != nil {
			for _, l := range s.listeners {
				_ = l.Close()
			}
		}
	}()
	path, ok := strings.CutPrefix(s.cfg.Socket, "unix://")
	if !ok || !filepath.IsAbs(path) {
		return fault.New(fault.Invalid, "cannot serve the CRI at %q: write unix:///absolute/path", s.cfg.Socket)
	}
	l, err := listenUnix(path)
	if err != nil {
		return fmt.Errorf("cannot serve the CRI: %w", err)
	}
	s.add(l, grpc.Creds(peerCredentials{}))
	if s.cfg.TCP == "" {
		return nil
	}
	conf, err := s.tls()
	if err != nil {
		return err
	}
	host, _, err := net.SplitHostPort(s.cfg.TCP)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return fault.New(fault.Invalid, "cannot serve the CRI at %q: a loopback address with a port is wanted, such as 127.0.0.1:10010", s.cfg.TCP)
	}
	if l, err = net.Listen("tcp", s.cfg.TCP); err != nil {
		return fmt.Errorf("cannot serve the CRI: %w", err)
	}
	s.add(l, grpc.Creds(credentials.NewTLS(conf)))
	return nil
}

// listenUnix takes a socket's path over from a daemon that is gone, and no other.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fault.New(fault.Conflict, "somebody listens at %s already", path)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSocket == 0 {
		return nil, fault.New(fault.Conflict, "%s is there and is no socket", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// Whoever can speak the CRI is root on this host.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func (s *Server) tls() (*tls.Config, error) {
	if s.cfg.Cert == "" || s.cfg.Key == "" || s.cfg.CA == "" {
		return nil, fault.New(fault.Invalid, "cannot serve the CRI at %s: it needs a certificate, a key and the authority of clients' certificates", s.cfg.TCP)
	}
	cert, err := tls.LoadX509KeyPair(s.cfg.Cert, s.cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("cannot load the CRI's certificate: %w", err)
	}
	pem, err := os.ReadFile(s.cfg.CA)
	if err != nil {
		return nil, fmt.Errorf("cannot load the authority of the CRI's clients: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fault.New(fault.Invalid, "cannot load the authority of the CRI's clients: %s holds no certificate", s.cfg.CA)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}, nil
}

func (s *Server) add(l net.Listener, opts ...grpc.ServerOption) {
	g := grpc.NewServer(append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.ChainUnaryInterceptor(s.audited, s.unary), grpc.ChainStreamInterceptor(s.stream),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	}, opts...)...)
	for _, d := range []*grpc.ServiceDesc{&v1.RuntimeService_ServiceDesc, &v1.ImageService_ServiceDesc} {
		g.RegisterService(d, s)
		old := *d
		old.ServiceName = strings.Replace(d.ServiceName, "runtime.v1.", "runtime.v1alpha2.", 1)
		g.RegisterService(&old, s)
	}
	s.grpc, s.listeners = append(s.grpc, g), append(s.listeners, l)
}

// Serve answers until ctx ends.
func (s *Server) Serve(ctx context.Context) error {
	var wg sync.WaitGroup
	errs := make(chan error, len(s.grpc))
	for i, g := range s.grpc {
		s.log.Info("serving the CRI", "address", s.listeners[i].Addr().String())
		wg.Go(func() { errs <- g.Serve(s.listeners[i]) })
	}
	<-ctx.Done()
	for _, g := range s.grpc {
		g.Stop() // watchers of events would hold a graceful one for ever
	}
	wg.Wait()
	s.streaming.stop()
	close(errs)
	var all error
	for err := range errs {
		if !errors.Is(err, grpc.ErrServerStopped) {
			all = errors.Join(all, err)
		}
	}
	return all
}
