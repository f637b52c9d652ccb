package config

import (
	"crypto/tls"
	"crypto/x509"

	"go.yaml.in/yaml/v3"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// TLS is who the engine is to those that reach it over the network, and whom it answers, PEM. It is for
// machines that nobody can bring files to before. The key is a secret: the document is to be kept as one then.
type TLS struct {
	// Cert is the engine's certificate with those that it is by, Key its key.
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	// CA are the authorities by which clients' certificates have to be.
	CA string `yaml:"ca"`
}

// check reads what is there, and whether the engine's document names files besides.
func (t *TLS) check(engine *yaml.Node) error {
	if *t == (TLS{}) {
		return nil
	}
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, "tls: "+format, args...) }
	if field(engine, "tls") != nil {
		return bad("engine.tls names files already: it is the one or the other")
	}
	if _, err := tls.X509KeyPair([]byte(t.Cert), []byte(t.Key)); err != nil {
		return bad("cert and key: %w", err)
	}
	if t.CA == "" || !x509.NewCertPool().AppendCertsFromPEM([]byte(t.CA)) {
		return bad("ca is no PEM certificate")
	}
	return nil
}
